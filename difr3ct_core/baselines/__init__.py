"""Methods that the paper compares with, and what one gets without learning."""
