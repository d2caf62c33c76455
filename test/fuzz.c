// libFuzzer's target: opens whatever bytes come as a file of weights, as a dataset and as class names.
//
//   make fuzz && mkdir -p seeds && ./train_cpu --image_size 2 --patch 2 --steps 1 --batch 2 --export seeds/data
//   ./fuzz -close_fd_mask=3 -max_total_time=60 seeds
//
// die, which a damaged file must end in, comes back here instead of ending the program; all else is a finding.

#define exit fuzz_exit
__attribute__((noreturn)) static void fuzz_exit(int status);
#include "../fpdm_cpu.c"
#undef exit
#include <setjmp.h>

static jmp_buf back;
static void fuzz_exit(int status) {
    (void)status;
    longjmp(back, 1);
}

static char path[64];
static void open_weights(void) {
    Options o;
    SafeTensors f;
    options_default(&o, SAMPLE);
    st_open(&f, path);
    options_from_meta(&o, &f, WEIGHTS);
}
static void open_dataset(void) {
    Dataset d;
    float x[4096];
    int y[1];
    dataset_open(&d, path, 8, 1);
    if (config_pixels(&(Config){.channels = d.channels, .image_size = d.size}) <= 4096)
        dataset_batch(&d, x, y, 0, 1, 0, 1, 1, 0.5);
    xfree(d.order);
}

const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "detect_leaks=0"; } // die frees nothing

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int file = -1;
    if (file < 0) {
        file = memfd_create("fuzz", 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    }
    if (size < 8) return 0;
    if (ftruncate(file, 0) || pwrite(file, data, size, 0) != (ssize_t)size) abort();
    for (int kind = 0; kind < 2; kind++) {
        if (!setjmp(back)) (kind ? open_dataset : open_weights)();
        while (open_files) st_close(open_files);
    }
    return 0;
}
