// Command dns is CoreDNS with the few plugins that a cluster's DNS needs.
// The stock program links every cloud's client libraries.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/hosts"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/log"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/template"
)

func main() {
	// Order matters: a query passes the plugins in the order listed here.
	dnsserver.Directives = []string{
		"bind", "ready", "health", "errors", "log", "cache", "hosts", "kubernetes", "template",
	}
	coremain.Run()
}
