// Package machine describes the machine that figures were measured on.
package machine

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
)

// Describe returns processor, cores, memory, kernel and distribution in one line.
// What cannot be read is left out.
func Describe() string {
	parts := []string{
		field("/proc/cpuinfo", "model name", ":"),
		fmt.Sprintf("%d cores", runtime.NumCPU()),
		memory(),
		"Linux " + release(),
		strings.Trim(field("/etc/os-release", "PRETTY_NAME", "="), `"`),
	}
	var known []string
	for _, p := range parts {
		if p != "" {
			known = append(known, p)
		}
	}
	return strings.Join(known, ", ")
}

// field returns the value of the first line of a file that has the key.
func field(file, key, separator string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		if k, v, ok := strings.Cut(line, separator); ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

func memory() string {
	kib, err := strconv.Atoi(strings.TrimSuffix(field("/proc/meminfo", "MemTotal", ":"), " kB"))
	if err != nil {
		return ""
	}
	return fmt.Sprintf("%.1f GiB", float64(kib)/(1<<20))
}

func release() string {
	text, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return "of unknown release"
	}
	number, _, _ := strings.Cut(strings.TrimSpace(string(text)), "-") // what follows is the distribution's
	return number
}
