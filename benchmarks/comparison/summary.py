def write_summary(results, output):
    print(results.keys())
