"""The methods of adapting a model, one file each.

To add a method, write one file in this folder: its config (a frozen dataclass, mostly a
`TargetConfig`), its part (a `Part`: the parameters of one layer), its wrapper (an `AttachedLinear`:
how the part computes, merges, and is called in PEFT's file), and its `Method`, which plans an
adapter and says what its files hold. A method that adapts linear layers subclasses `LinearMethod`,
which has most of that ready; ia3.py is the shortest example. Then add it to the list in known.py:
`attach`, `save_adapter` and `load_adapter` find it there. Users reach its config once it stands in
lorakit/__init__.py.
"""
