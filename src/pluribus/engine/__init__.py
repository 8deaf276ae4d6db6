"""The one driver: plan from headers, stream folds, merge, round once, write in place."""
