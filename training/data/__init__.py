"""What a distillation learns from: captioned clips, prepared or not."""
