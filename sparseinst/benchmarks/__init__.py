"""What models cost: time, memory, multiply-adds."""
