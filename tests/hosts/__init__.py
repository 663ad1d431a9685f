"""Other projects' training programs, with this package installed beside them: `python -m tests.hosts --help`."""
