"""The command line: options, run files, older names, errors in one line."""

from orpo.packages import require_trainer

require_trainer("the command line")
