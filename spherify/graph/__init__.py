"""Reading a model: one recorded run, and the facts about each of its layers."""
