"""What people read: summary, tables, pages and drawings, made of a run's records."""
