/* Copy memory past the caches.
 *
 * An ordinary store first reads the line of memory that it is about to overwrite: three trips over the memory bus for each byte copied
 * instead of two. glibc avoids that only in calls above a threshold, which on some machines is a quarter of a gigabyte.
 * Streaming stores are part of the baseline of x86-64. They are weakly ordered: the fence makes them visible before whatever comes next.
 * 512 bytes ahead: within the noise of 1024 and 2048 where it was tried, and 5 % better than nothing.
 */
#include <emmintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

void resilient_stream(char *to, const char *from, size_t count)
{
    size_t head = -(uintptr_t)to & 63;
    if (head > count)
        head = count;
    memcpy(to, from, head);
    to += head;
    from += head;
    count -= head;
    for (; count >= 64; count -= 64, to += 64, from += 64) {
        _mm_prefetch(from + 512, _MM_HINT_NTA); /* a hint: past the end it does nothing */
        __m128i a = _mm_loadu_si128((const __m128i *)from);
        __m128i b = _mm_loadu_si128((const __m128i *)(from + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(from + 32));
        __m128i d = _mm_loadu_si128((const __m128i *)(from + 48));
        _mm_stream_si128((__m128i *)to, a);
        _mm_stream_si128((__m128i *)(to + 16), b);
        _mm_stream_si128((__m128i *)(to + 32), c);
        _mm_stream_si128((__m128i *)(to + 48), d);
    }
    _mm_sfence();
    memcpy(to, from, count);
}
