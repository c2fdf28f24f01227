"""Adapters: score the candidate modules, plan which are fully trained, apply the plan with PEFT, draw it."""
