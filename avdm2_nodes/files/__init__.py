"""What lies on disk: students, styles, the miniature, and other tools' files."""
