"""What is wrong with a run or a server, the figure behind it, and what to do."""
