"""What can be measured, and against whom."""
