"""What is trained on and in which order: targets as examples, the plan that deals them out, and the items drawn against them.

Imports prepared.
"""
