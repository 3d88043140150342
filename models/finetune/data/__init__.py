"""Data of a finetune: conversations from files and the Hub, and their tokens, loss masks and images."""
