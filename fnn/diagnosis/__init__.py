"""Why does this network not train? Measure, change one thing, train again, and name the cause that a repair proves."""
