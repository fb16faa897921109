"""base_model"""
