"""What checks have done by a process with torch (exercise.py)."""
