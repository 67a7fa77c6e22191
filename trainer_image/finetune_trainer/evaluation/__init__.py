"""What a model is worth: losses, answers compared with references, and what they must reach"""
