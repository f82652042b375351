"""What users of other trainers bring along: TRL's command line and trainer attributes."""
