"""How do images become batches of action sequences on the device?"""
