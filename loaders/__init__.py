"""From images on disk to (views, actions, labels) on the device."""
