"""Scripts that an exported model takes along. They import nothing of this package, and export copies them as they are."""
