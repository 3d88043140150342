"""Generation: prompts to tokens, the decode step, and text again."""
