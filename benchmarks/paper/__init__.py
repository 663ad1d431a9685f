"""What the ORPO paper shows, as commands of this project; README.md beside this file walks through it."""
