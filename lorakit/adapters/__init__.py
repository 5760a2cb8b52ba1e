"""What one does with adapters: attach, switch, merge, combine, initialize, save and load them."""
