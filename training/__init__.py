"""Training of AVDM2 students: distillation, sampling from the command line, and evaluation."""
