"""What every run does alike, whatever the task."""
