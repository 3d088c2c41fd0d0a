package sentry

import (
	"encoding/json"
	_ "unsafe" // for go:linkname

	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	gsync "gvisor.dev/gvisor/pkg/sync"
)

// gVisor's published module has the place for compiled filters but none in it;
// its build system puts them there. So do we.
var (
	//go:linkname registerFilters gvisor.dev/gvisor/runsc/boot/filter.registerPrecompiledProgramsOnce
	registerFilters gsync.Once

	//go:linkname registeredFilters gvisor.dev/gvisor/runsc/boot/filter.precompiledPrograms
	registeredFilters map[string]precompiledseccomp.Program
)

// useCompiledFilter makes our compiled filter known to gVisor. gVisor looks it
// up by a name that says for which configuration it is good, and compiles its own
// when it wants another one, for instance in a build with the race detector.
func useCompiledFilter() {
	var p precompiledseccomp.Program
	if json.Unmarshal(compiledFilter, &p) != nil {
		return
	}
	registerFilters.Do(func() {
		registeredFilters = map[string]precompiledseccomp.Program{p.Name: p}
	})
}
