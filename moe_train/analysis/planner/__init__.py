"""moe-plan: what a layout costs in time, memory and traffic, and which layout to take."""
