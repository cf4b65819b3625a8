"""The main job end to end on a real model: `taskvec demo`."""
