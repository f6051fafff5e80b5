#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "count.h"

int main(int argc, char **argv)
{
    FILE *input = argc > 1 ? fopen(argv[1], "r") : stdin;
    if (!input) {
        fprintf(stderr, "%s: %s\n", argv[1], strerror(errno));
        return 1;
    }
    struct counts counts = {0};
    char buffer[4096];
    size_t length;
    while ((length = fread(buffer, 1, sizeof buffer, input)) > 0)
        count(&counts, buffer, length);
    printf("%zu %zu %zu\n", counts.lines, counts.words, counts.bytes);
    return 0;
}
