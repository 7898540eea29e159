"""AdamW with moments in 32 or 8 bits, on float32 master weights."""
