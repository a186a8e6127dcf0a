/* A stand-in for NVIDIA's libnvidia-ml.so.1, whose GPUs are a text file.
 *
 * Think of a puppet theatre: pynvml talks to the puppets through ctypes as it talks to the driver, and the file is who pulls the strings.
 * The file is named by FAKE_NVML and read again whenever it was replaced, also while a call waits. A line is "key value"; a key is looked
 * up as "<gpu>.<key>" and then as "*.<key>". What has no line is not supported (3), as on a GPU that lacks it.
 *
 *   init 18                    nvmlInit gives this error        count 8             as many GPUs
 *   0.pci 00000000:1A:00.0     its address                      0.lost 15           every call for it gives this error
 *   0.field.4 1                a field value; 0.field.206.3: for scope (link) 3
 *   0.link.3 0                 state of an NVLink               0.pcie.width 8      and so on; see the calls below
 *   error.nvmlDeviceGetTemperature 999      that call fails; 0.error.<call> for one GPU
 *   sleep.<call> 200           that call takes 200 ms           hang.<call> 1       and never returns while this line stands
 *   event.1 0 8 79             the first event that is called out: GPU, type, data; each is told to a set once
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

enum { SUCCESS = 0, INVALID = 2, UNSUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, TIMEOUT = 10, GPUS = 64, LINES = 8192 };

struct gpu { int index; };
struct set { int told; };
struct line { char *key, *value; };
struct pci { char old_id[16]; unsigned domain, bus, device, id, sub; char bus_id[32]; };
struct field { uint32_t id, scope; int64_t when, latency; int type, result; union { double d; unsigned u; uint64_t ull; } value; };
struct event { struct gpu *device; uint64_t type, data; unsigned gi, ci; };
struct process { unsigned pid; uint64_t bytes; unsigned gi, ci; };
struct fabric { unsigned version; uint8_t cluster[16]; int status; uint32_t clique; uint8_t state; uint32_t mask; };
struct sram { unsigned version; uint64_t counts[11]; unsigned exceeded; };
struct reading { unsigned version, sensor; int celsius; };

static struct gpu gpus[GPUS];
static struct line lines[LINES];
static int line_count;
static char *text;
static struct stat last;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int by_key(const void *a, const void *b) { return strcmp(((const struct line *)a)->key, ((const struct line *)b)->key); }

static void reread(void)
{
    const char *path = getenv("FAKE_NVML");
    struct stat now;
    if (!path || stat(path, &now) || (now.st_ino == last.st_ino && now.st_mtim.tv_nsec == last.st_mtim.tv_nsec && now.st_size == last.st_size))
        return;
    FILE *file = fopen(path, "r");
    if (!file)
        return;
    char *read = malloc((size_t)now.st_size + 1);
    size_t got = fread(read, 1, (size_t)now.st_size, file);
    fclose(file);
    read[got] = 0;
    free(text);
    text = read;
    last = now;
    line_count = 0;
    for (char *rest = read, *line; (line = strsep(&rest, "\n")) && line_count < LINES;) {
        char *key = strsep(&line, " ");
        if (*key && line)
            lines[line_count++] = (struct line){key, line};
    }
    qsort(lines, (size_t)line_count, sizeof *lines, by_key);
}

/* Copies the value of a key; 0 if there is none. */
static int find(const char *key, char *value, size_t size)
{
    pthread_mutex_lock(&lock);
    reread();
    struct line wanted = {(char *)key, 0}, *line = bsearch(&wanted, lines, (size_t)line_count, sizeof *lines, by_key);
    if (line)
        snprintf(value, size, "%s", line->value);
    pthread_mutex_unlock(&lock);
    return line != 0;
}

static int of_gpu(struct gpu *gpu, const char *key, char *value, size_t size)
{
    char full[128];
    snprintf(full, sizeof full, "%d.%s", gpu->index, key);
    if (find(full, value, size))
        return 1;
    snprintf(full, sizeof full, "*.%s", key);
    return find(full, value, size);
}

static uint64_t number(const char *key, uint64_t otherwise)
{
    char value[64];
    return find(key, value, sizeof value) ? strtoull(value, 0, 0) : otherwise;
}

static void nap(long ms)
{
    struct timespec time = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&time, 0);
}

/* What every call does first: take its time, hang, or fail as the file says. */
static int enter(const char *call, struct gpu *gpu)
{
    char key[96], value[64];
    snprintf(key, sizeof key, "sleep.%s", call);
    uint64_t ms = number(key, 0);
    if (ms)
        nap((long)ms);
    snprintf(key, sizeof key, "hang.%s", call);
    while (number(key, 0) || (gpu && of_gpu(gpu, key, value, sizeof value) && atoi(value)))
        nap(10);
    snprintf(key, sizeof key, "error.%s", call);
    int error = (int)number(key, 0);
    if (error)
        return error;
    if (gpu && of_gpu(gpu, "lost", value, sizeof value) && atoi(value))
        return atoi(value);
    if (gpu && of_gpu(gpu, key, value, sizeof value))
        return atoi(value);
    return SUCCESS;
}

static int get(const char *call, struct gpu *gpu, const char *key, unsigned *found)
{
    char value[64];
    int error = enter(call, gpu);
    if (error)
        return error;
    if (!of_gpu(gpu, key, value, sizeof value))
        return UNSUPPORTED;
    *found = (unsigned)strtoul(value, 0, 0);
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    int error = enter("nvmlInit", 0);
    return error ? error : (int)number("init", 0);
}

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int error)
{
    switch (error) {
    case 3: return "Not Supported";
    case 9: return "Driver Not Loaded";
    case 15: return "GPU is lost";
    case 18: return "Driver/library version mismatch";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *version, unsigned size)
{
    int error = enter("nvmlSystemGetDriverVersion", 0);
    if (!error && !find("driver", version, size))
        return UNSUPPORTED;
    return error;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    *count = (unsigned)number("count", 0);
    return enter("nvmlDeviceGetCount", 0);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct gpu **gpu)
{
    if (index >= number("count", 0) || index >= GPUS)
        return INVALID;
    gpus[index].index = (int)index;
    *gpu = &gpus[index];
    return enter("nvmlDeviceGetHandleByIndex", *gpu);
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *id, struct gpu **gpu)
{
    char value[64];
    for (unsigned index = 0; index < number("count", 0) && index < GPUS; index++) {
        gpus[index].index = (int)index;
        if (of_gpu(&gpus[index], "pci", value, sizeof value) && !strcasecmp(value, id)) {
            *gpu = &gpus[index];
            return enter("nvmlDeviceGetHandleByPciBusId", *gpu);
        }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetPciInfo_v3(struct gpu *gpu, struct pci *info)
{
    memset(info, 0, sizeof *info);
    int error = enter("nvmlDeviceGetPciInfo", gpu);
    if (!error && !of_gpu(gpu, "pci", info->bus_id, sizeof info->bus_id))
        return UNSUPPORTED;
    return error;
}

int nvmlDeviceGetUUID(struct gpu *gpu, char *uuid, unsigned size)
{
    int error = enter("nvmlDeviceGetUUID", gpu);
    if (!error && !of_gpu(gpu, "uuid", uuid, size))
        return UNSUPPORTED;
    return error;
}

int nvmlDeviceGetFieldValues(struct gpu *gpu, int count, struct field *fields)
{
    char key[64], value[64];
    int error = enter("nvmlDeviceGetFieldValues", gpu);
    for (int i = 0; !error && i < count; i++) {
        snprintf(key, sizeof key, "field.%u.%u", fields[i].id, fields[i].scope);
        int known = of_gpu(gpu, key, value, sizeof value);
        if (!known) {
            snprintf(key, sizeof key, "field.%u", fields[i].id);
            known = of_gpu(gpu, key, value, sizeof value);
        }
        fields[i].result = known ? SUCCESS : UNSUPPORTED;
        fields[i].type = 3; /* unsigned long long */
        fields[i].value.ull = known ? strtoull(value, 0, 0) : 0;
    }
    return error;
}

int nvmlDeviceGetNvLinkState(struct gpu *gpu, unsigned link, unsigned *active)
{
    char key[32];
    snprintf(key, sizeof key, "link.%u", link);
    return get("nvmlDeviceGetNvLinkState", gpu, key, active);
}

#define READS(call, key) int call(struct gpu *gpu, unsigned *found) { return get(#call, gpu, key, found); }
READS(nvmlDeviceGetCurrPcieLinkWidth, "pcie.width")
READS(nvmlDeviceGetMaxPcieLinkWidth, "pcie.width.max")
READS(nvmlDeviceGetCurrPcieLinkGeneration, "pcie.generation")
READS(nvmlDeviceGetMaxPcieLinkGeneration, "pcie.generation.max")
READS(nvmlDeviceGetPersistenceMode, "persistence")

int nvmlDeviceGetUtilizationRates(struct gpu *gpu, unsigned rates[2])
{
    rates[1] = 0;
    return get("nvmlDeviceGetUtilizationRates", gpu, "utilization", &rates[0]);
}

int nvmlDeviceGetCurrentClocksEventReasons(struct gpu *gpu, uint64_t *reasons)
{
    unsigned found = 0;
    int error = get("nvmlDeviceGetCurrentClocksEventReasons", gpu, "reasons", &found);
    *reasons = found;
    return error;
}

int nvmlDeviceGetTemperature(struct gpu *gpu, int sensor, unsigned *celsius)
{
    (void)sensor;
    return get("nvmlDeviceGetTemperature", gpu, "temperature", celsius);
}

int nvmlDeviceGetTemperatureV(struct gpu *gpu, struct reading *reading)
{
    return get("nvmlDeviceGetTemperatureV", gpu, "temperature", (unsigned *)&reading->celsius);
}

int nvmlDeviceGetTemperatureThreshold(struct gpu *gpu, int which, unsigned *celsius)
{
    char key[32];
    snprintf(key, sizeof key, "threshold.%d", which);
    return get("nvmlDeviceGetTemperatureThreshold", gpu, key, celsius);
}

int nvmlDeviceGetSramEccErrorStatus(struct gpu *gpu, struct sram *status)
{
    unsigned errors = 0, exceeded = 0;
    int error = get("nvmlDeviceGetSramEccErrorStatus", gpu, "sram.uncorrected", &errors);
    if (error)
        return error;
    get("nvmlDeviceGetSramEccErrorStatus", gpu, "sram.exceeded", &exceeded);
    status->counts[3] = errors; /* volatileUncParity */
    status->exceeded = exceeded;
    return SUCCESS;
}

int nvmlDeviceGetGpuFabricInfoV(struct gpu *gpu, struct fabric *info)
{
    unsigned state = 0, status = 0, mask = 0;
    int error = get("nvmlDeviceGetGpuFabricInfoV", gpu, "fabric.state", &state);
    if (error)
        return error;
    get("nvmlDeviceGetGpuFabricInfoV", gpu, "fabric.status", &status);
    get("nvmlDeviceGetGpuFabricInfoV", gpu, "fabric.mask", &mask);
    info->state = (uint8_t)state;
    info->status = (int)status;
    info->mask = mask;
    return SUCCESS;
}

/* processes "pid:bytes pid:bytes" */
int nvmlDeviceGetComputeRunningProcesses_v3(struct gpu *gpu, unsigned *count, struct process *found)
{
    char value[512] = "";
    int error = enter("nvmlDeviceGetComputeRunningProcesses", gpu);
    if (error)
        return error;
    of_gpu(gpu, "processes", value, sizeof value);
    unsigned there = 0;
    for (char *rest = value, *one; (one = strsep(&rest, " "));) {
        char *bytes = strchr(one, ':');
        if (!bytes)
            continue;
        if (found && there < *count)
            found[there] = (struct process){(unsigned)atoi(one), strtoull(bytes + 1, 0, 0), ~0u, ~0u};
        there++;
    }
    int small = there > *count || (!found && there);
    *count = there;
    return small ? TOO_SMALL : SUCCESS;
}

int nvmlDeviceGetSupportedEventTypes(struct gpu *gpu, uint64_t *types)
{
    *types = 0xB;
    return enter("nvmlDeviceGetSupportedEventTypes", gpu);
}

int nvmlEventSetCreate(struct set **set)
{
    *set = calloc(1, sizeof **set);
    return enter("nvmlEventSetCreate", 0);
}

int nvmlEventSetFree(struct set *set) { free(set); return SUCCESS; }

int nvmlDeviceRegisterEvents(struct gpu *gpu, uint64_t types, struct set *set)
{
    (void)types, (void)set;
    return enter("nvmlDeviceRegisterEvents", gpu);
}

int nvmlEventSetWait_v2(struct set *set, struct event *event, unsigned ms)
{
    char key[32], value[64];
    unsigned index;
    unsigned long type, data;
    int error = enter("nvmlEventSetWait", 0);
    if (error)
        return error;
    snprintf(key, sizeof key, "event.%d", set->told + 1);
    for (unsigned waited = 0;; waited += 5) {
        if (find(key, value, sizeof value) && sscanf(value, "%u %lu %lu", &index, &type, &data) == 3 && index < GPUS) {
            set->told++;
            *event = (struct event){&gpus[index], type, data, ~0u, ~0u};
            return SUCCESS;
        }
        if (waited >= ms)
            return TIMEOUT;
        nap(5);
    }
}
