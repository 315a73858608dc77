"""The rendered world of the miniature, and the program that reads its clips exactly."""
