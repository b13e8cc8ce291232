"""The steps from a user's model to a rewritten graph, one file per step, in the order of DESIGN
section 1: capture, normalise, recognise, analyse, rules, substitute, verify."""
