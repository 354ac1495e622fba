"""What is behind the pages of webui_amharic.py: the workspace, command lines, jobs, and readers of what jobs write."""
