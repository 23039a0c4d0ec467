from __future__ import annotations
def explain_program(p): return "todo"
def explain_all(ps): return "\n".join(p.explain() for p in ps)
