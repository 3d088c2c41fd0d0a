// Command filters compiles the seccomp filter of our sentries and writes it
// where the runtime embeds it. gVisor would compile it anew in every sentry,
// which takes as long as half of the boot.
package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	_ "unsafe" // for go:linkname

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/seccomp"
	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/pkg/sentry/platform"
	_ "gvisor.dev/gvisor/pkg/sentry/platform/systrap" // registers itself
	"gvisor.dev/gvisor/runsc/boot/filter/config"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: filters FILE")
		os.Exit(2)
	}
	data, err := compile()
	if err == nil {
		err = os.WriteFile(os.Args[1], data, 0o644)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "filters:", err)
		os.Exit(1)
	}
}

// rules is gVisor's own, which leaves open what only the running sentry knows.
// Its exported twin compiles all the hundreds of programs that gVisor could ever
// want, for minutes.
//
//go:linkname rules gvisor.dev/gvisor/runsc/boot/filter/config.rules
func rules(opt config.Options, vars precompiledseccomp.Values) (allow, deny seccomp.SyscallRules)

// compile returns the one program that our sentries use: systrap, gVisor's own
// network stack, no host files and no devices of the host.
func compile() ([]byte, error) {
	systrap, err := platform.Lookup("systrap")
	if err != nil {
		return nil, err
	}
	opt := config.Options{Platform: systrap.PrecompiledSeccompInfo()[0]}
	vars := slices.Collect(maps.Keys(opt.Vars()))
	program, err := precompiledseccomp.Precompile(opt.ConfigKey(), vars, func(v precompiledseccomp.Values) *seccomp.Program {
		allow, deny := rules(opt, v)
		// gVisor takes the number of the compiling process here, by mistake. Our
		// sentries are the first process of their own namespace.
		allow.Remove(unix.SYS_RT_TGSIGQUEUEINFO)
		allow.Set(unix.SYS_RT_TGSIGQUEUEINFO, seccomp.PerArg{
			seccomp.EqualTo(1), seccomp.AnyValue{}, seccomp.EqualTo(unix.SIGKILL),
		})
		return &seccomp.Program{
			RuleSets: []seccomp.RuleSet{{Rules: deny.Copy()}, {Rules: allow.Copy(), Action: seccomp.Allow}},
			Options:  config.SeccompOptions(opt),
		}
	})
	if err != nil {
		return nil, err
	}
	data, err := json.Marshal(program)
	return append(data, '\n'), err
}
