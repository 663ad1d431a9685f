"""How a batch of pairs is laid out: padded, packed, or with each prompt once."""
