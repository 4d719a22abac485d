"""`hafnium rollout report`: one HTML file that shows, to who wasn't there, what was decided, on which evidence, and by whom."""
