"""Router-aware mixed precision: what each scheme costs, how to spend a budget, upstream's algorithms driven."""
