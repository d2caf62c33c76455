// Tests of the safetensors reader and writer: what is broken must be refused with status 1 and one line that names the
// file and the reason, what is right must come back bit for bit, and a failed write must leave the old file alone. The
// includer provides CHECK(name, condition), the program under test, and <dirent.h>, <signal.h>, <sys/resource.h>,
// <sys/wait.h>.

static char test_folder[PATH_MAX - 64];

static const char *test_path(const char *name) {
    static char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", test_folder, name);
    return path;
}

// Runs action(path) in a child; returns its exit status (-1: killed by a signal) and what it said on standard error.
static int test_child(void (*action)(const char *path), const char *path, char *said, size_t room) {
    int ends[2], status;
    size_t length = 0;
    ssize_t got;
    fflush(NULL);
    if (pipe(ends)) die("pipe: %s", strerror(errno));
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
        action(path);
        exit(0);
    }
    close(ends[1]);
    while ((got = read(ends[0], said + length, room - 1 - length)) > 0) length += (size_t)got;
    said[length] = 0;
    close(ends[0]);
    if (child < 0 || waitpid(child, &status, 0) < 0) die("fork: %s", strerror(errno));
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// True if the action ends with status 1 and exactly one line, which contains `reason`.
static int test_refuses(void (*action)(const char *path), const char *path, const char *reason) {
    char said[8192];
    int status = test_child(action, path, said, sizeof said);
    char *newline = strchr(said, '\n');
    int ok = status == 1 && newline && newline[1] == 0 && strncmp(said, "error: ", 7) == 0 && strstr(said, reason);
    if (!ok) printf("    status %d, wanted \"%s\", said: %s\n", status, reason, said);
    return ok;
}

static void test_open(const char *path) {
    SafeTensors f;
    st_open(&f, path);
    for (int i = 0; i < f.n_tensors; i++) { // every byte that the reader vouches for can be read
        const unsigned char *data = (const unsigned char *)f.tensors[i].data;
        unsigned sum = 0;
        for (size_t k = 0; k < f.tensors[i].bytes; k++) sum += data[k];
        if (sum == 1u << 31) puts("");
        if (st_find(&f, f.tensors[i].name) != &f.tensors[i]) abort();
    }
    st_close(&f);
}

static void test_open_floats(const char *path) {
    float out[64];
    SafeTensors f;
    st_open(&f, path);
    st_to_float(&f, &f.tensors[0], out);
}

static void test_write(const char *path, const void *bytes, size_t size) {
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(bytes, 1, size, file) != size || fclose(file)) die("%s: %s", path, strerror(errno));
}

// Writes length + header + `data` bytes of 1; `length` -1 stands for the true one.
static void test_write_file(const char *path, const char *header, size_t size, long long length, size_t data) {
    unsigned char *bytes = (unsigned char *)malloc(8 + size + data);
    if (!bytes) die("no memory for a test");
    for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)((length < 0 ? size : (unsigned long long)length) >> 8 * i);
    memcpy(bytes + 8, header, size);
    memset(bytes + 8 + size, 1, data);
    test_write(path, bytes, 8 + size + data);
    free(bytes);
}

#define T_(name, dtype, shape, begin, end) \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" begin "," end "]}"
#define TOO_DEEP "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["

// A header, how many bytes of data follow, and part of the message; NULL: the file is right.
static const struct {
    const char *name, *header;
    size_t data;
    const char *reason;
} test_headers[] = {
    {"no tensors", "{}", 0, NULL},
    {"one tensor", "{" T_("a", "F32", "[2,3]", "0", "24") "}   ", 24, NULL},
    {"white space", "{\n\t\"a\" : { \"shape\":[ ] ,\"data_offsets\":[0 , 4 ],\"dtype\":\"F32\" } }\r\n", 4, NULL},
    {"empty tensors",
     "{" T_("a", "F32", "[0]", "0", "0") "," T_("b", "U8", "[3]", "0", "3") "," T_("c", "I64", "[5,0]", "3", "3") "}",
     3, NULL},
    {"metadata", "{\"__metadata__\":{\"k\":\"v\",\"l\":\"\"}," T_("a", "U8", "[1]", "0", "1") "}", 1, NULL},
    {"escapes", "{" T_("\\u00e9\\u20ac\\u0041\\\\\\/\\\"", "U8", "[1]", "0", "1") "}", 1, NULL},
    {"UTF-8", "{" T_("\xc3\xa9\xf0\x9f\x98\x80", "U8", "[1]", "0", "1") "}", 1, NULL},
    {"no header", "", 0, "no header"},
    {"not JSON", "hello", 0, "no header"},
    {"a list", "[]", 0, "no header"},
    {"space before the header", " {}", 0, "no header"},
    {"unfinished", "{", 0, "expected '\"'"},
    {"unfinished name", "{\"a", 0, "a string does not end"},
    {"unfinished escape", "{\"a\\", 0, "unknown escape"},
    {"unfinished entry", "{\"a\":{\"dtype\":\"F32\"", 0, "tensor a: expected '}'"},
    {"text after the header", "{}x", 0, "text follows the header"},
    {"two headers", "{}{}", 0, "text follows the header"},
    {"NUL after the header", NULL, 0, "text follows the header"}, // written by hand: the string ends at the NUL
    {"comma at the end", "{" T_("a", "U8", "[1]", "0", "1") ",}", 1, "expected '\"'"},
    {"no comma", "{" T_("a", "U8", "[1]", "0", "1") T_("b", "U8", "[1]", "1", "2") "}", 2, "expected '}'"},
    {"entry is a string", "{\"a\":\"b\"}", 0, "tensor a: expected '{'"},
    {"entry is null", "{\"a\":null}", 0, "tensor a: expected '{'"},
    {"entry is empty", "{\"a\":{}}", 0, "tensor a: expected '\"'"},
    {"nested too deep", "{\"a\":" TOO_DEEP TOO_DEEP, 0, "tensor a: expected '{'"},
    {"shape nested too deep", "{\"a\":{\"shape\":" TOO_DEEP TOO_DEEP, 0, "tensor a: expected a whole number"},
    {"no dtype", "{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
     "tensor a: dtype, shape or data_offsets is missing"},
    {"no shape", "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1, "is missing"},
    {"no offsets", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, "is missing"},
    {"two dtypes", "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "twice"},
    {"unknown key", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"stride\":[1]}}", 1, "unknown"},
    {"unknown dtype", "{" T_("a", "F33", "[1]", "0", "4") "}", 4, "tensor a: unknown dtype F33"},
    {"lower-case dtype", "{" T_("a", "f32", "[1]", "0", "4") "}", 4, "unknown dtype f32"},
    {"dtype is a number", "{\"a\":{\"dtype\":32,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "expected '\"'"},
    {"negative dimension", "{" T_("a", "U8", "[-1]", "0", "1") "}", 1, "tensor a: expected a whole number"},
    {"fractional dimension", "{" T_("a", "U8", "[1.0]", "0", "1") "}", 1, "expected ']'"},
    {"exponent", "{" T_("a", "U8", "[1e0]", "0", "1") "}", 1, "expected ']'"},
    {"dimension is a string", "{" T_("a", "U8", "[\"1\"]", "0", "1") "}", 1, "expected a whole number"},
    {"dimension is null", "{" T_("a", "U8", "[null]", "0", "1") "}", 1, "expected a whole number"},
    {"huge dimension", "{" T_("a", "U8", "[99999999999999999999]", "0", "1") "}", 1, "a number is too large"},
    {"2^64+1", "{" T_("a", "U8", "[18446744073709551617]", "0", "1") "}", 1, "a number is too large"},
    {"overflowing shape", "{" T_("a", "F32", "[4294967296,4294967296]", "0", "0") "}", 0, "its shape is too large"},
    {"overflowing bytes", "{" T_("a", "F32", "[4611686018427387904]", "0", "0") "}", 0, "its shape is too large"},
    {"nine dimensions", "{" T_("a", "U8", "[1,1,1,1,1,1,1,1,1]", "0", "1") "}", 1, "a list is too long"},
    {"one offset", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0]}}", 1, "must be two numbers"},
    {"three offsets", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1,2]}}", 1, "a list is too long"},
    {"negative offset", "{" T_("a", "U8", "[1]", "-1", "0") "}", 1, "expected a whole number"},
    {"end before begin", "{" T_("a", "U8", "[1]", "2", "1") "}", 2, "tensor a: its data ends before it begins"},
    {"beyond the file", "{" T_("a", "F32", "[2]", "0", "8") "}", 7,
     "tensor a: its data lies beyond the end of the file"},
    {"far beyond the file", "{" T_("a", "U8", "[1]", "9223372036854775798", "9223372036854775799") "}", 7,
     "beyond the end"},
    {"size does not fit", "{" T_("a", "F32", "[2]", "0", "4") "}", 4, "tensor a: its shape and dtype do not fit"},
    {"overlap", "{" T_("a", "U8", "[4]", "0", "4") "," T_("b", "U8", "[4]", "2", "6") "}", 6, "tensor b: shares bytes"},
    {"same place", "{" T_("a", "U8", "[4]", "0", "4") "," T_("b", "U8", "[4]", "0", "4") "}", 4,
     "tensor b: shares bytes"},
    {"hole", "{" T_("a", "U8", "[4]", "0", "4") "," T_("b", "U8", "[2]", "6", "8") "}", 8,
     "tensor b: a gap lies before it"},
    {"hole at the start", "{" T_("a", "U8", "[4]", "4", "8") "}", 8, "tensor a: a gap lies before it"},
    {"bytes at the end", "{" T_("a", "U8", "[4]", "0", "4") "}", 5, "bytes follow the last tensor"},
    {"name twice", "{" T_("a", "U8", "[4]", "0", "4") "," T_("a", "U8", "[2]", "4", "6") "}", 6,
     "the name a stands there twice"},
    {"name twice by an escape", "{" T_("a", "U8", "[0]", "0", "0") "," T_("\\u0061", "U8", "[2]", "0", "2") "}", 2,
     "twice"},
    {"metadata twice", "{\"__metadata__\":{},\"__metadata__\":{}}", 0, "__metadata__ is there twice"},
    {"metadata key twice", "{\"__metadata__\":{\"k\":\"v\",\"k\":\"v\"}}", 0, "the name k stands there twice"},
    {"metadata number", "{\"__metadata__\":{\"k\":1}}", 0, "expected '\"'"},
    {"metadata null", "{\"__metadata__\":null}", 0, "expected '{'"},
    {"metadata list", "{\"__metadata__\":[\"k\"]}", 0, "expected '{'"},
    {"metadata nested", "{\"__metadata__\":{\"k\":{}}}", 0, "expected '\"'"},
    {"unknown escape", "{\"a\\x41\":{}}", 0, "unknown escape"},
    {"short \\u", "{\"\\u12\":{}}", 0, "four hexadecimal digits"},
    {"\\u0000", "{\"a\\u0000\":{}}", 0, "\\u0000"},
    {"half a surrogate pair", "{\"\\ud83d\":{}}", 0, "half a surrogate"},
    {"half a surrogate pair, then an escape", "{\"\\ud83d\\u0041\":{}}", 0, "half a surrogate"},
    {"a surrogate pair turned around", "{\"\\ude00\\ud83d\":{}}", 0, "half a surrogate"},
    {"control character", "{\"a\nb\":{}}", 0, "a control character"},
    {"NUL in a name", "{\"a\\u0000b\":{}}", 0, "\\u0000"},
    {"line break in a name", "{" T_("a\\u000ab\\u001b[31m", "U8", "[2]", "0", "1") "}", 1,
     "tensor a?b?[31m: its shape"},
};

static void test_save_few(const char *path) {
    static const unsigned char few[3] = {7, 8, 9};
    Tensor t = st_tensor("few", U8, few, 1, 3, 1, 1, 1);
    st_save(path, &t, 1, NULL, 0);
}

// 1 MB, more than the limit on file size lets through: what a full disk looks like to the writer.
static void test_save_much(const char *path) {
    struct rlimit limit = {65536, 65536};
    void *much = xcalloc(1 << 20, 1, "a test");
    Tensor t = st_tensor("much", U8, much, 1, 1 << 20, 1, 1, 1);
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    st_save(path, &t, 1, NULL, 0);
}

static void test_parse_names(const char *json) {
    int count;
    parse_class_names("names", json, &count);
}

static int test_files_in_folder(void) {
    int n = 0;
    DIR *folder = opendir(test_folder);
    while (folder && readdir(folder)) n++;
    if (folder) closedir(folder);
    return n - 2;
}

static void test_round_trip(void) {
    float a[6] = {0, -0.0f, 1e-42f, 3.4e38f, INFINITY, -1.5f}, back[6];
    uint16_t b[3] = {float_to_bf16(1.00390625f), float_to_bf16(NAN), float_to_bf16(-INFINITY)};
    int64_t y[2] = {-5, INT64_MAX};
    unsigned char u[5] = {0, 1, 127, 128, 255};
    Tensor t[4] = {st_tensor("y", I64, y, 1, 2, 1, 1, 1), st_tensor("a", F32, a, 4, 1, 2, 1, 3),
                   st_tensor("b", BF16, b, 2, 3, 1, 1, 1),
                   st_tensor("u \"quoted\\\" \n\t\x01 \xc3\xa9 \xff", U8, u, 1, 5, 1, 1, 1)};
    Meta meta[2] = {{"z", "last \"one\"\\\n"}, {"class_names", "[\"a\\\"\", \"b\\u00e9\\n\\t\\ud83d\\ude00\"]"}};
    const char *path = test_path("round.safetensors");
    SafeTensors f;
    st_save(path, t, 4, meta, 2);
    st_open(&f, path);
    CHECK("round trip: tensors and metadata", f.n_tensors == 4 && f.n_meta == 2);
    int same = 1, aligned = 1;
    for (int i = 0; i < 4; i++) {
        const Tensor *r = st_find(&f, t[i].name);
        same &= r && r->dtype == t[i].dtype && r->ndim == t[i].ndim && r->count == t[i].count &&
                r->bytes == t[i].bytes && !memcmp(r->shape, t[i].shape, sizeof r->shape[0] * (size_t)r->ndim) &&
                !memcmp(r->data, t[i].data, r->bytes);
        aligned &= r && (uintptr_t)r->data % dtype_sizes[r->dtype] == 0;
    }
    CHECK("round trip: same bytes", same);
    CHECK("round trip: aligned", aligned);
    CHECK("round trip: metadata", st_meta(&f, "z") && !strcmp(st_meta(&f, "z"), meta[0].value) && !st_meta(&f, "y"));
    CHECK("round trip: absent tensor", !st_find(&f, "absent"));
    st_to_float(&f, st_find(&f, "a"), back);
    CHECK("to float: F32", !memcmp(a, back, sizeof a));
    st_to_float(&f, st_find(&f, "b"), back);
    CHECK("to float: BF16", back[0] == 1 && back[1] != back[1] && back[2] == -INFINITY);
    int count;
    const char **names = parse_class_names("names", st_meta(&f, "class_names"), &count);
    CHECK("class names", count == 2 && !strcmp(names[0], "a\"") && !strcmp(names[1], "b\xc3\xa9\n\t\xf0\x9f\x98\x80"));
    CHECK("class names, written", !strcmp(st_meta(&f, "class_names"), meta[1].value));
    for (int i = 0; i < count; i++) free((char *)names[i]);
    free(names);
    CHECK("class names, absent", !parse_class_names("names", NULL, &count) && count == 0);
    CHECK("class names, empty", !parse_class_names("names", " [ ] ", &count) && count == 0);
    st_close(&f);
    CHECK("class names, not a list", test_refuses(test_parse_names, "{}", "class_names: expected '['"));
    CHECK("class names, numbers", test_refuses(test_parse_names, "[1]", "expected '\"'"));
    CHECK("class names, unfinished", test_refuses(test_parse_names, "[\"a\",", "expected '\"'"));
    CHECK("class names, text after", test_refuses(test_parse_names, "[\"a\"],", "text follows the list"));
}

static void test_save_failures(void) {
    const char *path = test_path("target.safetensors");
    SafeTensors f;
    test_save_few(path);
    int before = test_files_in_folder();
    CHECK("disk full", test_refuses(test_save_much, path, "target.safetensors: cannot write: "));
    st_open(&f, path);
    CHECK("disk full: the old file is there", f.n_tensors == 1 && st_find(&f, "few"));
    st_close(&f);
    CHECK("disk full: no temporary file", test_files_in_folder() == before);
    CHECK("no such folder", test_refuses(test_save_few, test_path("absent/x"), "absent/x: cannot write: "));
    CHECK("target is a folder", test_refuses(test_save_few, test_folder, "is not a regular file"));
    const char *pipe_path = test_path("pipe");
    CHECK("target is a pipe",
          mkfifo(pipe_path, 0600) == 0 && test_refuses(test_save_few, pipe_path, "is not a regular file"));
    remove(pipe_path);
    remove(test_path("target.safetensors"));
}

// Opens `rounds` files whose header is damaged at random; the reader may accept or refuse, never crash or say two
// lines.
static void test_fuzz(int rounds) {
    static const char *const words[] = {"0",
                                        "-1",
                                        "9223372036854775807",
                                        "18446744073709551616",
                                        "\"",
                                        "{",
                                        "}",
                                        "[",
                                        "]",
                                        ",",
                                        ":",
                                        "\\",
                                        "\\u",
                                        "\\ud83d",
                                        "1e9",
                                        "null",
                                        "\"dtype\"",
                                        "\xff",
                                        "\n",
                                        " "};
    static const char seed[] =
        "{\"__metadata__\":{\"class_names\":\"[\\\"a\\\"]\"}," T_("w", "F32", "[2,3]", "0", "24") "," T_(
            "b\\u20ac", "BF16", "[4]", "24", "32") "," T_("y", "U8", "[]", "32", "33") "}";
    const char *path = test_path("fuzz.safetensors");
    int bad = 0, accepted = 0;
    test_write_file(path, seed, sizeof seed - 1, -1, 33);
    test_open(path); // undamaged, it is accepted
    for (int round = 0; round < rounds; round++) {
        char text[1024], said[8192];
        size_t size = sizeof seed - 1, data = 33;
        long long length = -1;
        uint32_t r[4];
        memcpy(text, seed, size);
        philox(r, 1, 0, (uint32_t)round, 0);
        for (uint32_t i = 0, n = 1 + r[0] % 3; i < n; i++) {
            philox(r, 1, 1 + i, (uint32_t)round, 0);
            size_t at = rng_below(r[1], (uint32_t)size), cut = r[2] % 12;
            const char *word = words[r[3] % (sizeof words / sizeof *words)];
            if (cut > size - at) cut = size - at;
            switch (r[0] / 8 % 12) {
                default:
                    text[at] = (char)r[2];
                    break;
                case 1:
                    text[at] = (char)(text[at] ^ 1 << r[2] % 7);
                    break;
                case 2:
                    memmove(text + at, text + at + cut, size - at - cut);
                    size -= cut;
                    break;
                case 3:
                    memmove(text + at + strlen(word), text + at, size - at);
                    memcpy(text + at, word, strlen(word));
                    size += strlen(word);
                    break;
                case 4:
                    memmove(text + at + cut, text + at, size - at);
                    size += cut;
                    break;
                case 5:
                    data = r[2] % 66;
                    break;
                case 6:
                    length = r[2] % 2 ? (long long)(r[3] % (size + data + 2))
                                      : (long long)((uint64_t)r[3] << (r[2] >> 8) % 32);
            }
            if (size == 0) text[size++] = '{';
        }
        test_write_file(path, text, size, length, data);
        int status = test_child(test_open, path, said, sizeof said);
        const char *newline = strchr(said, '\n');
        int ok = status == 0 ? !*said : status == 1 && newline && !newline[1] && strstr(said, "fuzz.safetensors: ");
        accepted += status == 0;
        if (!ok && bad++ < 5) printf("    round %d: status %d, said: %s\n", round, status, said);
    }
    printf("    %d damaged files: %d accepted, %d refused\n", rounds, accepted, rounds - accepted);
    CHECK("damaged at random", bad == 0);
    remove(path);
}

static void test_files(void) {
    const char *base = getenv("TMPDIR");
    snprintf(test_folder, sizeof test_folder, "%s/fpdm_test_XXXXXX", base && *base ? base : "/tmp");
    if (!mkdtemp(test_folder)) die("%s: %s", test_folder, strerror(errno));
    const char *path = test_path("header.safetensors");
    for (size_t i = 0; i < sizeof test_headers / sizeof *test_headers; i++) {
        char name[128], said[8192];
        const char *header = test_headers[i].header, *reason = test_headers[i].reason;
        snprintf(name, sizeof name, "header: %s", test_headers[i].name);
        if (header)
            test_write_file(path, header, strlen(header), -1, test_headers[i].data);
        else
            test_write_file(path, "{}\0", 3, -1, 0);
        int right = reason
                        ? test_refuses(test_open, path, reason) && test_refuses(test_open, path, "header.safetensors: ")
                        : test_child(test_open, path, said, sizeof said) == 0 && !*said;
        CHECK(name, right);
    }
    test_write(path, "", 0);
    CHECK("file: empty", test_refuses(test_open, path, "is only 0 bytes long"));
    test_write(path, "\2\0\0\0\0\0\0", 7);
    CHECK("file: 7 bytes", test_refuses(test_open, path, "is only 7 bytes long"));
    test_write_file(path, "", 0, 0, 0);
    CHECK("file: 8 bytes", test_refuses(test_open, path, "no header"));
    test_write_file(path, "{}", 2, 3, 0);
    CHECK("file: header longer than the file", test_refuses(test_open, path, "no header can be 3 bytes"));
    test_write_file(path, "{}", 2, 100000001, 0);
    CHECK("file: header over 100 MB", test_refuses(test_open, path, "no header can be 100000001 bytes"));
    test_write_file(path, "{}", 2, INT64_MAX, 0);
    CHECK("file: header of 2^63-1 bytes", test_refuses(test_open, path, "no header can be"));
    test_write(path, "\xff\xff\xff\xff\xff\xff\xff\xff{}", 10);
    CHECK("file: header of 2^64-1 bytes", test_refuses(test_open, path, "no header can be 18446744073709551616 bytes"));
    test_write_file(path, "{" T_("a", "I64", "[1]", "0", "8") "}", strlen("{" T_("a", "I64", "[1]", "0", "8") "}"), -1,
                    8);
    CHECK("file: integers are no weights", test_refuses(test_open_floats, path, "tensor a: is I64"));
    if (geteuid() != 0 && chmod(path, 0) == 0) {
        CHECK("file: no permission", test_refuses(test_open, path, "cannot open: Permission denied"));
    }
    remove(path);
    CHECK("file: absent", test_refuses(test_open, path, "header.safetensors: cannot open: No such file"));
    CHECK("file: a folder", test_refuses(test_open, test_folder, "is not a file"));
    test_round_trip();
    test_save_failures();
    test_fuzz(300);
    remove(test_path("round.safetensors"));
    CHECK("nothing is left behind", test_files_in_folder() == 0);
    rmdir(test_folder);
}
