"""What "all the tasks" means: data sets by name, tasks made from them, zoos of specialists.

`sets` finds data, `views` turns it into tasks, `zoo` trains and scores specialists on them.
"""
