"""What arrives when, if images come as a stream of tasks, and what is kept of it to be trained on again?"""
