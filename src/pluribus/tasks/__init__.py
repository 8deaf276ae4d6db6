"""What "all the tasks" means: data sets by name, tasks made from them, zoos of specialists.

`sets` finds data, `views` turns it into tasks, `zoo` trains and scores specialists on them; `named`
holds tasks by name (`get("sst2")`), `systems` what can be evaluated, `evaluate` makes Reports.
"""

from pluribus.tasks.named import get, groups, names

__all__ = ["get", "groups", "names"]
