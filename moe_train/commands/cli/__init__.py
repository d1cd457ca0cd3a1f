"""What all console scripts share: overrides, help, completion, messages."""
