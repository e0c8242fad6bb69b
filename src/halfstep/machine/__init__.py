"""The machine: what it can do, measured, and the process settings that let it."""
