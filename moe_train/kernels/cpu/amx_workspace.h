/* Memory that a thread keeps from call to call. */
#ifndef MOE_TRAIN_WORKSPACE_H
#define MOE_TRAIN_WORKSPACE_H

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "amx_matrix.h"

enum { LARGE_PAGE = 2 << 20, KEPT = 32 << 20, NO_MEMORY = 1 };

/* Workspace of this thread, kept between calls up to KEPT bytes, since a new one has to map its pages again. */
static __thread char *own_workspace;
static __thread long own_size;
static pthread_key_t workspace_key; /* frees the workspace when the thread ends */

__attribute__((constructor)) static void prepare(void) { pthread_key_create(&workspace_key, free); }

static void keep(char *workspace, long size) {
    free(own_workspace);
    own_workspace = workspace;
    own_size = workspace ? size : 0;
    pthread_setspecific(workspace_key, workspace);
}

static char *workspace_of(long size) {
    if (size > own_size) {
        size = (size + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
        keep(0, 0);
        keep(aligned_alloc(LARGE_PAGE, size), size);
        if (own_workspace) madvise(own_workspace, size, MADV_HUGEPAGE);
    }
    return own_workspace;
}

static inline void release(void) {
    _tile_release();
    if (own_size > KEPT) keep(0, 0);
}

#endif
