"""Pure functions on tensors: noise, schedule, diffusion steps, masks, threat model, statistics, rendering."""
