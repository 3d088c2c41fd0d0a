// Command atoll-sentry is the kernel of a gVisor sandbox. The gvisor runtime
// starts it; it is of no use by itself.
package main

import (
	"fmt"
	"os"

	"github.com/atoll-run/atoll/runtime/gvisor/sentry"
)

func main() {
	if !sentry.Wanted() {
		fmt.Fprintln(os.Stderr, "atoll-sentry: started by atoll for each sandbox, not by hand")
		os.Exit(2)
	}
	sentry.Main()
}
